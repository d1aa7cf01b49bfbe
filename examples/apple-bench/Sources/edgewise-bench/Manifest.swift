import CryptoKit
import Foundation

/// What the tool reads of a bundle's `manifest.json`.
struct Manifest: Decodable {
    struct Model: Decodable { let source: String }
    struct Digested: Decodable {
        let sha256: String
        let bytes: Int
    }
    struct Artifact: Decodable {
        let target: String
        let role: String
        let precision: String
        let files: [String]
        let function: String?
    }

    let edgewiseVersion: String
    let model: Model
    let compress: [String]?
    let targets: [Artifact]
    let files: [String: Digested]

    enum CodingKeys: String, CodingKey {
        case edgewiseVersion = "edgewise_version"
        case model, compress, targets, files
    }

    static func read(_ bundle: URL) throws -> (Manifest, String) {
        let data = try Data(contentsOf: bundle.appending(path: "manifest.json"))
        return (try JSONDecoder().decode(Manifest.self, from: data), sha256(data))
    }

    /// SHA-256 over the digests of an artifact's files in order, and their size in bytes.
    func digest(of artifact: Artifact) throws -> (String, Int) {
        let found = try artifact.files.map { name in
            guard let file = files[name] else { throw Failure("the manifest has no digest of \(name)") }
            return file
        }
        let joined = found.map(\.sha256).joined()
        return (sha256(Data(joined.utf8)), found.reduce(0) { $0 + $1.bytes })
    }
}

func sha256(_ data: Data) -> String {
    SHA256.hash(data: data).map { String(format: "%02x", $0) }.joined()
}
