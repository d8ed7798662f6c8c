"""SQL: tables, engine and clock, migrations. Queries live beside what they serve."""
