"""GGUF, llama.cpp's model files, without torch: the container (`container.py`) and the tokenizer in it
(`vocabulary.py`). What its hyperparameters and tensors mean to our decoder is said in `tandem/model/gguf_*.py`.
"""
