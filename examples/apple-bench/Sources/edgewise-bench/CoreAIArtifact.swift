#if canImport(CoreAI)
import CoreAI
import Foundation

/// A Core AI model: loaded by the system, which chooses the unit, and run on arrays as they are allocated.
@available(macOS 27, iOS 27, *)
struct CoreAIArtifact {
    let function: InferenceFunction
    let inputs: [String: NDArray]
    let loadMilliseconds: Double

    init(model url: URL) async throws {
        _ = try await AIModel(contentsOf: url)
        let clock = ContinuousClock()
        let start = clock.now
        let model = try await AIModel(contentsOf: url)
        guard let descriptor = model.functionDescriptor(for: "main"), let function = try model.loadFunction(named: "main")
        else { throw Failure("\(url.lastPathComponent) has no function main") }
        loadMilliseconds = milliseconds(clock.now - start)
        var arrays: [String: NDArray] = [:]
        for name in descriptor.inputNames {
            guard case .ndArray(let array) = descriptor.inputDescriptor(of: name) else {
                throw Failure("input \(name) is no array")
            }
            arrays[name] = NDArray(descriptor: array)
        }
        self.function = function
        inputs = arrays
    }

    func run() async throws {
        _ = try await function.run(inputs: inputs)
    }
}
#endif
