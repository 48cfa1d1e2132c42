"""What lies at URLs: object storage, the copies of banks, pictures that are fetched, results that are stored there."""
