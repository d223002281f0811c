"""Arrow data into PostgreSQL by COPY. Imported when something is written, not before: pyarrow is big."""
