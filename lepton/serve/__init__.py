"""`python -m lepton serve`: a server that speaks OpenAI's API, on the engine of `lepton.engine`.

limits      what a request may ask for
fields      reading the fields of a request's JSON
requests    a request: what it asks for, checked
dialogue    the messages of a conversation become tokens
scoring     the log-probabilities of a prompt's own tokens
answer      one text being generated: its pieces, and where it ends
turns       what the model has read of a conversation when an answer ends
worker      the thread of the engine, in which answers join and leave
replies     the JSON of replies and of streamed chunks
metrics     counters in Prometheus' text form
openapi     the description of all this for programs
conversations, state_files, conversation_routes
            conversations that are kept: in memory, on disk, over HTTP
app         routes, keys and errors over HTTP
server      the process: port, signals, draining

It needs Starlette and uvicorn: ``pip install starlette uvicorn``.
"""
