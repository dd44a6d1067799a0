"""Jobs on a fake engine, over SQLite and, where TANDEM_TEST_DATABASE_URL says where, PostgreSQL."""

import os
import sys
import warnings
from pathlib import Path

import pytest
import sqlalchemy as sa

from tandem.config import DEMO_MODEL
from tandem.jobs.store import metadata
from tandem.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parent))
from places import Place  # noqa: E402

POSTGRES = os.environ.get("TANDEM_TEST_DATABASE_URL")


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load(str(DEMO_MODEL))


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request):
    """None is SQLite in the state directory. PostgreSQL is emptied first."""
    if request.param == "sqlite":
        yield None
        return
    if not POSTGRES:
        warnings.warn("PostgreSQL is NOT tested: TANDEM_TEST_DATABASE_URL is unset (.ci/run sets it)", stacklevel=1)
        pytest.skip("TANDEM_TEST_DATABASE_URL is unset: PostgreSQL is NOT tested")
    engine = sa.create_engine(sa.make_url(POSTGRES).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        metadata.drop_all(connection)
        connection.execute(sa.text("drop table if exists alembic_version"))
    engine.dispose()
    yield POSTGRES


@pytest.fixture
async def place(tmp_path, tokenizer):
    """On SQLite."""
    place = Place(tmp_path / "state", tokenizer)
    yield place
    if place.jobs is not None:
        await place.jobs.close()


@pytest.fixture
async def any_place(tmp_path, tokenizer, database_url):
    """On both databases."""
    place = Place(tmp_path / "state", tokenizer, database_url)
    yield place
    if place.jobs is not None:
        await place.jobs.close()
