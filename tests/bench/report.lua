-- Makes wrk end with its numbers as JSON. Out of the environment: a body to POST, a key to show.
local body, token = os.getenv("BENCH_BODY"), os.getenv("BENCH_TOKEN")

if body then
    wrk.method, wrk.body = "POST", body
    wrk.headers["Content-Type"] = "application/json"
end
if token then
    wrk.headers["Authorization"] = "Bearer " .. token
end

function done(summary, latency)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    io.write(string.format('REPORT {"requests": %d, "us": %d, "failed": %d, "median_us": %f}\n',
        summary.requests, summary.duration, failed, latency:percentile(50)))
end
