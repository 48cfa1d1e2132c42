"""Scores pictures as they arrive, from a folder, a video or a camera, and delivers the verdicts, each once."""
