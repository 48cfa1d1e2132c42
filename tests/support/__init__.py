"""What several test packages use: an oracle in float64, generated banks and features."""
