# Sourced before `ray start` on every node: the environment that Ray's and Serve's processes inherit.
. .venv/bin/activate

# Redis for replica loads, settings and decisions; one for the whole cluster, reachable from every node.
export REDIS_URL="${REDIS_URL:-redis://10.0.0.10:6380/0}"

# Anyone who reaches an unauthenticated Ray cluster can run code on it. The token file is copied by `ray up`.
export RAY_AUTH_MODE=token

# The fast data plane: HAProxy to the ingress replicas, gRPC from there to the engines, no extra threads between.
export RAY_SERVE_ENABLE_HA_PROXY=1
export RAY_SERVE_USE_GRPC_BY_DEFAULT=1
export RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0
export RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP=0
export RAY_SERVE_LOG_TO_STDERR=0

# Log lines of ingress, router and engines are in /tmp/ray/session_latest/logs/worker-*.err of their node.
export RAY_ROTATION_MAX_BYTES=134217728
export RAY_ROTATION_BACKUP_COUNT=2
export RAY_SERVE_HAPROXY_BINARY_PATH="$PWD/deploy/ray/haproxy.sh"

# Slow and greedy clients: see deploy/ray/haproxy.sh. The second is also how long a client may take nothing of a stream.
export HEADER_TIMEOUT_S="${HEADER_TIMEOUT_S:-10}"
export RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S="${RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S:-30}"
export MAX_CLIENT_CONNECTIONS="${MAX_CLIENT_CONNECTIONS:-2048}"
