"""The schema: migrations and tables agree, a migration cut short leaves nothing, a newer one is not trampled on."""

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from tandem.errors import ConfigError, Conflict
from tandem.jobs import queries, store
from tandem.jobs.records import TRANSITIONS, UNFINISHED, Job, TandemExtras, new_id


@pytest.fixture
def database(tmp_path, database_url):
    database = store.Database.open(database_url, tmp_path)
    yield database
    database.close()


def test_migrations_make_the_tables(database):
    with database._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), store.metadata) == []


def test_opening_again_keeps_what_is_there(tmp_path, database_url):
    for _ in range(2):
        database = store.Database.open(database_url, tmp_path)
        with database._engine.begin() as connection:
            value = queries.mark(connection, "x")
            if value is None:
                queries.set_mark(connection, "x", "1")
        database.close()
    assert value == "1"


def test_a_database_from_before_there_were_graders(tmp_path):
    database = store.Database.open(None, tmp_path)
    job = Job(job_id="ftjob-old", created_at=0, status="queued", model="m", base_model="m", training_file="f", seed=1,
              hyperparameters={}, tandem=TandemExtras())  # fmt: skip
    with database._engine.begin() as connection:
        queries.add_job(connection, job)
        connection.execute(sa.text("alter table jobs drop column grader"))
        connection.execute(sa.text("update alembic_version set version_num = '0001'"))
    database.close()
    database = store.Database.open(None, tmp_path)
    with database._engine.begin() as connection:
        assert queries.job(connection, "ftjob-old") == job
    database.close()


def test_a_migration_cut_short_leaves_nothing(tmp_path, database_url, monkeypatch):
    from alembic import op

    real, made = op.create_table, []

    def create_table(name, *args, **kwargs):
        made.append(name)
        if len(made) == 4:
            raise KeyboardInterrupt
        return real(name, *args, **kwargs)

    monkeypatch.setattr(op, "create_table", create_table)
    with pytest.raises(KeyboardInterrupt):
        store.Database.open(database_url, tmp_path)
    monkeypatch.setattr(op, "create_table", real)
    database = store.Database.open(database_url, tmp_path)
    assert set(store.metadata.tables) <= set(sa.inspect(database._engine).get_table_names())
    database.close()


def test_a_database_of_a_newer_version_is_refused(tmp_path, database_url):
    database = store.Database.open(database_url, tmp_path)
    with database._engine.begin() as connection:
        connection.execute(sa.text("update alembic_version set version_num = '9999'"))
    database.close()
    with pytest.raises(ConfigError, match="newer"):
        store.Database.open(database_url, tmp_path)


async def test_sqlite_is_in_wal_mode_and_waits(tmp_path):
    database = store.Database.open(None, tmp_path)
    assert await database.run(lambda c: c.exec_driver_sql("pragma journal_mode").scalar()) == "wal"
    assert await database.run(lambda c: c.exec_driver_sql("pragma busy_timeout").scalar()) >= 5000
    database.close()


@pytest.mark.parametrize("before", TRANSITIONS)
async def test_a_status_moves_along_the_table_only(database, before):
    for after in TRANSITIONS:
        job = Job(
            job_id=new_id("ftjob-"), created_at=0, status=before, model="m", base_model="m", training_file="f",
            seed=2**31 - 1, hyperparameters={}, tandem=TandemExtras(),
        )  # fmt: skip
        await database.run(queries.add_job, job)
        assert await database.run(queries.job, job.job_id) == job
        if after in TRANSITIONS[before]:
            moved = await database.run(queries.move, job.job_id, after, "told")
            assert moved.status == after and (moved.finished_at is not None) == (after not in UNFINISHED)
        else:
            with pytest.raises(Conflict):
                await database.run(queries.move, job.job_id, after)
            assert (await database.run(queries.job, job.job_id)).status == before


async def test_text_that_databases_choke_on_is_escaped_in_events(database):
    await database.run(queries.add_event, "j", "a\0b\ud800c", "error")
    with database._engine.connect() as connection:
        assert connection.scalar(sa.select(store.events.c.message)) == "a\\0b\\ud800c"
