"""A server in a process of its own, to be killed: `python -m served STATE_DIR ROWS` prints its job's id."""

import asyncio
import sys
from pathlib import Path

from places import Place

from tandem.config import DEMO_MODEL
from tandem.tokenizer import Tokenizer


async def serve(root, rows):
    place = Place(root, Tokenizer.load(str(DEMO_MODEL)))
    place.engine.delay = 0.001
    await place.open(resume_every_s=0.01)
    found, _ = await place.jobs.jobs()
    job = found[0] if found else await place.create(rows=rows)
    print(job.job_id, flush=True)
    await asyncio.Event().wait()


asyncio.run(serve(Path(sys.argv[1]), int(sys.argv[2])))
