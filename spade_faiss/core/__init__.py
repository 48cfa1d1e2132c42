"""What everything stands on: errors, settings, files on disk, memory sizes, devices."""
