"""How Alembic runs here: on the connection that `store.migrate` brings, in one transaction."""

from alembic import context

from tandem.jobs.store import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
