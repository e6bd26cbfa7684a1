"""The batch file formats: rows in, requests spilled, completions out."""
