"""What the server holds under load: throughput, latency, memory, kills, feedback, and whatever a client may send."""
