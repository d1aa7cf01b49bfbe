import CoreML
import CoreVideo
import Foundation

/// A Core ML package, or one of its functions: compiled, loaded for some compute units, and run on zeros.
struct CoreMLArtifact {
    let model: MLModel
    let compiled: URL
    let loadMilliseconds: Double
    let configuration: MLModelConfiguration

    init(package: URL, function: String?, units: MLComputeUnits) async throws {
        configuration = MLModelConfiguration()
        configuration.computeUnits = units
        configuration.functionName = function
        compiled = try await MLModel.compileModel(at: package)
        _ = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        let clock = ContinuousClock()
        let start = clock.now
        model = try await MLModel.load(contentsOf: compiled, configuration: configuration)
        loadMilliseconds = milliseconds(clock.now - start)
    }

    /// Arrays of zeros for every input. A package of edgewise takes arrays, or images if it was exported so.
    func inputs() throws -> MLDictionaryFeatureProvider {
        var values: [String: MLFeatureValue] = [:]
        for (name, description) in model.modelDescription.inputDescriptionsByName {
            if let constraint = description.multiArrayConstraint {
                let array = try MLMultiArray(shape: constraint.shape, dataType: constraint.dataType)
                array.withUnsafeMutableBytes { bytes, _ in _ = bytes.initializeMemory(as: UInt8.self, repeating: 0) }
                values[name] = MLFeatureValue(multiArray: array)
            } else if let constraint = description.imageConstraint {
                var buffer: CVPixelBuffer?
                CVPixelBufferCreate(
                    nil, constraint.pixelsWide, constraint.pixelsHigh, constraint.pixelFormatType, nil, &buffer)
                guard let buffer else { throw Failure("no image could be made for input \(name)") }
                values[name] = MLFeatureValue(pixelBuffer: buffer)
            } else {
                throw Failure("input \(name) is neither an array nor an image")
            }
        }
        return try MLDictionaryFeatureProvider(dictionary: values)
    }

    /// How many operations Core ML means to run on each unit; null where the model is no program.
    func placement() async throws -> [String: Int]? {
        let plan = try await MLComputePlan.load(contentsOf: compiled, configuration: configuration)
        guard case .program(let program) = plan.modelStructure, let main = program.functions[configuration.functionName ?? "main"]
        else { return nil }
        var found: [String: Int] = [:]
        var pending = [main.block]
        while let block = pending.popLast() {
            for operation in block.operations {
                pending += operation.blocks
                guard let device = plan.deviceUsage(for: operation)?.preferred else { continue }
                found[unit(device), default: 0] += 1
            }
        }
        return found
    }

    private func unit(_ device: MLComputeDevice) -> String {
        switch device {
        case .cpu: "CPU"
        case .gpu: "GPU"
        case .neuralEngine: "Neural Engine"
        @unknown default: "other"
        }
    }
}
