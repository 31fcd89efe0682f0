"""`python -m lepton serve`: a server that speaks OpenAI's API, on the engine of `lepton.engine`.

limits      what a request may ask for
fields      reading the fields of a request's JSON
requests    a request: what it asks for, checked
scoring     the log-probabilities of a prompt's own tokens
answer      one text being generated: its pieces, and where it ends
worker      the thread of the engine, in which answers join and leave
replies     the JSON of replies and of streamed chunks
metrics     counters in Prometheus' text form
app         routes, keys and errors over HTTP
server      the process: port, signals, draining

Starlette and uvicorn come with the extra `serve`: ``pip install "lepton-lm[serve]"``.
"""
