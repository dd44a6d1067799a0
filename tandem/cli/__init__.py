"""The command line, one file per family of verbs. Nothing here is imported before its verb is typed, and no module here
imports torch, transformers or fastapi at its top: `tandem --help` has to answer at once."""
