"""The database: engine, unit of work, topics, migrations."""
