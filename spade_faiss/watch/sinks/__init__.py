"""Where verdicts go to: a folder, a webhook, an MQTT topic, a server of this project."""
