-- Makes wrk end with its numbers as JSON.
function done(summary, latency)
    local errors = summary.errors
    local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
    io.write(string.format('REPORT {"requests": %d, "us": %d, "failed": %d, "median_us": %f}\n',
        summary.requests, summary.duration, failed, latency:percentile(50)))
end
