"""The server's HTTP: the API, the page, and what keeps both safe."""
