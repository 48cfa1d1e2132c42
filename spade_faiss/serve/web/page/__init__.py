"""The page on which people look at verdicts and answer them."""
