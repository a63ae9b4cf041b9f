"""Files of rows with named columns: CSV as spreadsheets write it, JSON Lines, Parquet. What a file is shows in its content."""
