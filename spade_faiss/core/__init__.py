"""The foundation of all other packages: errors, settings, files on disk, memory sizes, devices, hints."""
