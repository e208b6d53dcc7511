"""`infer-align rewards check`: find out how far the configured rewards can be trusted.

Without a file, each reward scores a few texts and is compared with Hugging Face's usual recipe
(`recipe.py`). With a file of pairs or pools of answers, `command.py` measures accuracy,
calibration, length, members, over-optimisation and attacks:

    questions.py  read the file                 verdicts.py  say what the figures mean
    chosen.py     choose and start rewards      page.py      write them as a page
    scoring.py    score answers and attacks     plots.py     draw its plots
    report.py     compute the figures           export.py    write them as JSON
"""
