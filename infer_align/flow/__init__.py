"""The flow of one request: parse it, plan it, draw candidates, score them, select one."""
