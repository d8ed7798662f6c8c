"""Alembic's entry: runs on the connection that `service.db.schema` hands over."""

from alembic import context

from service.db.tables import metadata

connection = context.config.attributes["connection"]
context.configure(
    connection=connection,
    target_metadata=metadata,
    render_as_batch=connection.dialect.name == "sqlite",
)
if connection.dialect.name == "postgresql":
    connection.exec_driver_sql("SET LOCAL lock_timeout = '5s'")
    # Two upgraders at once: the second waits and then finds nothing to do.
    connection.exec_driver_sql("SELECT pg_advisory_xact_lock(718281828)")
context.run_migrations()
