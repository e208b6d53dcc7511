"""`infer-align bench judge`: how often a judge prefers the answer that people prefer."""
