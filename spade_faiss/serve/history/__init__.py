"""What was scored, on disk: verdicts in a database, pictures and maps in files. No HTTP in here."""
