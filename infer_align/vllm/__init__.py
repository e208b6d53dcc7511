"""Adapters for vLLM. No other module of this project imports vLLM.

    package.py      the installed version and its options; needs no import of vLLM
    interfaces.py   the parts of vLLM's objects that other packages use, as protocols
    worker.py       imported by vLLM's workers: logits processors and hidden states
    start_errors.py why an engine did not start; imported by vLLM's processes too
    compat.py       imported by the server: engines, their options and their errors
    openai.py       imported by the server: vLLM's own OpenAI layer over an engine

Importing vLLM takes ten seconds or more. Import worker.py, compat.py and openai.py only when an
engine starts.
"""
