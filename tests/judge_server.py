"""A language model behind an address, as an oracle sees it: a real HTTP server that says which text is longer."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Judge:
    """A real server. It prefers the longer answer, and A wherever they are equally long; `plan` says how it fails."""

    def __init__(self, plan=()):
        self.plan, self.questions, self.keys, self.lock = list(plan), [], [], threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with judge.lock:
                    judge.questions.append(body)
                    judge.keys.append(self.headers.get("Authorization"))
                    how = judge.plan.pop(0) if judge.plan else "well"
                judge.reply(self, how, body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def reply(self, handler, how, body):
        if isinstance(how, int):
            handler.send_response(how)
            handler.end_headers()
            return
        if how == "hang":
            time.sleep(0.6)
        data = {"garbage": b"<html>", "empty": b'{"choices": []}'}.get(how) or self.verdict(how, body)
        try:
            handler.send_response(200)
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:
            pass  # the client has hung up

    def verdict(self, how, body):
        _, first, second = body["messages"][0]["content"].split("|")
        letter = "neither" if how == "evasive" else "A" if len(first) >= len(second) else "B"
        if not body.get("logprobs"):
            return json.dumps({"choices": [{"message": {"content": f"{letter}."}}]}).encode()
        likely = -0.2 if how != "nan" else float("nan")
        tokens = [{"token": letter, "logprob": likely}, {"token": " B" if letter == "A" else "A", "logprob": -2.2}]
        return json.dumps({"choices": [{"logprobs": {"content": [{"top_logprobs": tokens}]}}]}).encode()
