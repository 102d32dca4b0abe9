-- Sends the requests of a file to /v1/rank, one after another and again from the first: for wrk (github.com/wg/wrk).
--
--     cappy bench serve --url http://127.0.0.1:8000 --connections 4 --pairs-per-request 1 \
--         --pairs-per-request 4 --bodies bodies.jsonl
--     BODIES=bodies.jsonl wrk --threads 1 --connections 4 --duration 60s --timeout 30s --latency \
--         --script docs/examples/load/rank.lua http://127.0.0.1:8000
--
-- BODIES is written by `cappy bench serve --bodies`: bodies in JSON, one a line. Every thread of wrk sends all of them.

local requests = {}
local place = 0

function init()
  local headers = { ["Content-Type"] = "application/json" }
  local key = os.getenv("API_KEY")
  if key then headers["Authorization"] = "Bearer " .. key end
  for body in io.lines(os.getenv("BODIES") or "bodies.jsonl") do
    requests[#requests + 1] = wrk.format("POST", "/v1/rank", headers, body)
  end
  if #requests == 0 then error("there are no requests in BODIES") end
end

function request()
  place = place % #requests + 1
  return requests[place]
end

function done(summary, latency, _)
  local failed = summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout
  io.write(string.format(
    '{"requests": %d, "requests_per_second": %.3f, "p50_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f, "not_200": %d, "failed": %d}\n',
    summary.requests, summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, latency.max / 1e3, summary.errors.status, failed))
end
