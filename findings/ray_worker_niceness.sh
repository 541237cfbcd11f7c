#!/usr/bin/env bash
# Ray's workers run with niceness 15, so beside anything else they get a thirtieth of a core.
#
# Versions:  ray 2.60.0.
# Behaviour: a task or an actor of a local Ray runs in a process whose niceness is 15 above the driver's. On a machine
#            with other work at normal priority Linux gives such a process a weight of 36 against 1024. Nothing in
#            ray.init asks for it or changes it; the environment variable RAY_worker_niceness does.
# Output:    driver 0, worker 15, worker with RAY_worker_niceness=0: 0
# Why it matters here: times of a sweep that is measured beside other work, or on a shared node, are of starved workers;
#            a worker that is too slow to register in time is killed, and looks like a broken one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ray==2.60.0
cat > "$folder/niceness.py" <<'PY'
import os
import ray

ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")


@ray.remote
def niceness():
    return os.nice(0)


print(os.nice(0), ray.get(niceness.remote()))
PY
export RAY_USAGE_STATS_ENABLED=0 RAY_worker_register_timeout_seconds=900 RAY_gcs_server_port_wait_time_s=900
read -r driver worker < <("$folder/venv/bin/python" "$folder/niceness.py" 2> /dev/null)
read -r _ asked < <(RAY_worker_niceness=0 "$folder/venv/bin/python" "$folder/niceness.py" 2> /dev/null)
"$folder/venv/bin/python" -c 'import ray; print("ray", ray.__version__)'
echo "driver $driver, worker $worker, worker with RAY_worker_niceness=0: $asked"
[ $((worker - driver)) = 15 ] && [ "$asked" = "$driver" ]
