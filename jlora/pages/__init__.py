"""The pages that jlora writes, each one self-contained HTML file: their frame, tables, charts and lists of rows."""
