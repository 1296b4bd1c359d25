"""The server: other projects' HTTP interfaces over one engine. Needs the extra `quire[serve]`.

    app.py       one ASGI application: guard, routes, errors          server.py   the socket, TLS, SIGTERM
    guard.py     size limits, hosts, keys, before anything is parsed  keys.py     who may come in, hashed
    service.py   requests in, deltas out, over the one engine         admission.py  when to say: later
    forms.py     what requests may say, as types                      prompt.py   chat templates, tokens and text
    chat.py completions.py responses.py messages.py plain.py          the endpoints
    tools.py     tool calls in and out                                grammar.py  JSON schemas, regexes, grammars
    metrics.py   for Prometheus                                       errors.py   what a client is told
    tracing.py   OpenTelemetry's spans
    watch.py recent.py   what is going on, as one document            dashboard.py page/  the page at /

Nothing here touches a tensor: everything goes through `quire.engine.Engine`.
"""
