import Foundation

/// How times are taken: at least `samples` runs and at least `seconds` of them, after `warmup` runs.
struct Timing {
    var warmup = 10
    var samples = 100
    var seconds = 5.0
}

let mostSamples = 100_000

/// Times of one run, in milliseconds, in the order in which they were taken.
func measure(_ how: Timing, _ run: () async throws -> Void) async throws -> [Double] {
    let clock = ContinuousClock()
    for _ in 0..<how.warmup { try await run() }
    var times: [Double] = []
    let start = clock.now
    while times.count < mostSamples && (times.count < how.samples || clock.now - start < .seconds(how.seconds)) {
        times.append(milliseconds(try await clock.measure { try await run() }))
    }
    return times
}

func milliseconds(_ duration: Duration) -> Double {
    let (seconds, attoseconds) = duration.components
    return Double(seconds) * 1e3 + Double(attoseconds) * 1e-15
}

/// The statistics of the record: percentiles of the nearest rank; the variation is null with one sample.
func statistics(_ template: JSON, of times: [Double]) throws -> JSON {
    let sorted = times.sorted()
    guard let least = sorted.first, let most = sorted.last else { throw Failure("nothing was timed") }
    let mean = times.reduce(0, +) / Double(times.count)
    var variation: Any = NSNull()
    if times.count > 1 {
        let squares = times.reduce(0) { $0 + ($1 - mean) * ($1 - mean) }
        variation = (squares / Double(times.count - 1)).squareRoot() / mean
    }
    func percentile(_ share: Double) -> Double {
        sorted[max(0, Int((share / 100 * Double(sorted.count)).rounded(.up)) - 1)]
    }
    return try filled(
        template,
        [
            "n": times.count, "mean_ms": mean, "min_ms": least, "max_ms": most, "cv": variation, "samples_ms": times,
            "p50_ms": percentile(50), "p90_ms": percentile(90), "p95_ms": percentile(95), "p99_ms": percentile(99),
        ])
}
