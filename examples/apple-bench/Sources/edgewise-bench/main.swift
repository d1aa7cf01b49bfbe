import CoreML
import Foundation

// Times the Core ML packages and Core AI models of a bundle that edgewise made, and writes a benchmark record.
//
//     edgewise-bench BUNDLE RECORD.json [--units all|cpu|cpu-gpu|cpu-ane] [--samples N] [--seconds S] [--warmup N]

let unitsByName: [String: MLComputeUnits] = [
    "all": .all, "cpu": .cpuOnly, "cpu-gpu": .cpuAndGPU, "cpu-ane": .cpuAndNeuralEngine,
]

struct Options {
    var bundle = URL(fileURLWithPath: ".")
    var record = URL(fileURLWithPath: "record.json")
    var units = "all"
    var timing = Timing()

    init(_ arguments: [String]) throws {
        var paths: [String] = []
        var rest = arguments[...]
        while let word = rest.popFirst() {
            guard word.hasPrefix("--") else {
                paths.append(word)
                continue
            }
            guard let value = rest.popFirst() else { throw Failure("\(word) wants a value") }
            switch word {
            case "--units":
                guard unitsByName[value] != nil else {
                    throw Failure("--units is one of \(unitsByName.keys.sorted().joined(separator: ", "))")
                }
                units = value
            case "--samples": timing.samples = try number(value, word, least: 1)
            case "--warmup": timing.warmup = try number(value, word, least: 0)
            case "--seconds": timing.seconds = Double(try number(value, word, least: 0))
            default: throw Failure("there is no option \(word)")
            }
        }
        guard paths.count == 2 else { throw Failure("give a bundle and the file of the record") }
        bundle = URL(fileURLWithPath: paths[0])
        record = URL(fileURLWithPath: paths[1])
    }
}

func number(_ text: String, _ option: String, least: Int) throws -> Int {
    guard let value = Int(text), value >= least else { throw Failure("\(option) wants a whole number from \(least) on") }
    return value
}

func measured(_ artifact: Manifest.Artifact, of manifest: Manifest, _ options: Options, _ template: Template) async throws -> JSON? {
    guard let first = artifact.files.first else { return nil }
    // The main file of an artifact lies in its folder.
    let folder = options.bundle.appending(path: first).deletingLastPathComponent()
    let (digest, bytes) = try manifest.digest(of: artifact)
    var values: JSON = [
        "artifact": "\(artifact.target)/\(artifact.role)/\(artifact.precision)", "artifact_digest": digest,
        "artifact_bytes": bytes, "target": artifact.target, "role": artifact.role, "precision": artifact.precision,
        "runtime_versions": ["system": ProcessInfo.processInfo.operatingSystemVersionString],
        "reasons": ["inputs are zeros; accuracy was not checked: edgewise verify does"],
    ]
    let times: [Double]
    if folder.pathExtension == "mlpackage" {
        let loaded = try await CoreMLArtifact(package: folder, function: artifact.function, units: unitsByName[options.units] ?? .all)
        values["units"] = options.units
        let inputs = try loaded.inputs()
        times = try await measure(options.timing) { _ = try await loaded.model.prediction(from: inputs) }
        values["warm_load_ms"] = loaded.loadMilliseconds
        if let placement = try await loaded.placement() {
            values["placement"] = placement
        } else {
            values["unknown"] = ["placement": "the model is no program"]
        }
    } else if folder.pathExtension == "aimodel" {
        #if canImport(CoreAI)
        guard #available(macOS 27, iOS 27, *) else { return nil }
        let loaded = try await CoreAIArtifact(model: folder)
        times = try await measure(options.timing) { try await loaded.run() }
        values["warm_load_ms"] = loaded.loadMilliseconds
        values["unknown"] = ["placement": "Core AI does not say where a function ran"]
        #else
        return nil
        #endif
    } else {
        return nil
    }
    values["latency"] = try statistics(template.latency, of: times)
    return try filled(template.measurement, values)
}

func run() async throws {
    let options = try Options(Array(CommandLine.arguments.dropFirst()))
    let template = try Template()
    let (manifest, digest) = try Manifest.read(options.bundle)
    let began = ISO8601DateFormatter().string(from: Date())
    var measurements: [JSON] = []
    for artifact in manifest.targets {
        if let one = try await measured(artifact, of: manifest, options, template) { measurements.append(one) }
    }
    guard !measurements.isEmpty else { throw Failure("the bundle has no artifact that this system runs") }
    guard let hostTemplate = template.record["host"] as? JSON, let protocolTemplate = template.record["protocol"] as? JSON
    else { throw Failure("the template of the record is damaged") }
    let process = ProcessInfo.processInfo
    let host = try filled(
        hostTemplate,
        [
            "os": process.operatingSystemVersionString, "cores_logical": process.processorCount,
            "memory_bytes": Int(process.physicalMemory),
            "power_mode": process.isLowPowerModeEnabled ? "low power" : "usual",
        ])
    let timing = try filled(
        protocolTemplate,
        ["warmup": options.timing.warmup, "samples": options.timing.samples, "seconds": options.timing.seconds])
    let record = try filled(
        template.record,
        [
            "edgewise_version": manifest.edgewiseVersion, "bundle_digest": digest, "model": manifest.model.source,
            "compress": manifest.compress ?? [], "measured_at": began, "host": host, "protocol": timing,
            "measurements": measurements,
        ])
    let data = try JSONSerialization.data(withJSONObject: record, options: [.prettyPrinted, .sortedKeys])
    try data.write(to: options.record, options: .atomic)
}

do {
    try await run()
} catch {
    FileHandle.standardError.write(Data("edgewise-bench: \(error)\n".utf8))
    exit(2)
}
