"""Banks that are served, and what runs behind the requests. No HTTP in here."""
