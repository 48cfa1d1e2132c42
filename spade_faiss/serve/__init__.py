"""The engine on a line: a server that scores pictures, remembers verdicts and learns from what people say of them."""
