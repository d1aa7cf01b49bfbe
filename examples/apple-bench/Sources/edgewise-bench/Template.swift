import Foundation

typealias JSON = [String: Any]

/// The record to fill in. It holds every key that this tool writes, and no other is ever added, so that what checks the template
/// against the schema of edgewise checks the tool's keys.
struct Template {
    let record: JSON
    let measurement: JSON
    let latency: JSON

    init() throws {
        guard let url = Bundle.module.url(forResource: "record", withExtension: "json"),
            let record = try JSONSerialization.jsonObject(with: Data(contentsOf: url)) as? JSON,
            let measurement = (record["measurements"] as? [JSON])?.first,
            let latency = measurement["latency"] as? JSON
        else { throw Failure("the template of the record is missing") }
        self.record = record
        self.measurement = measurement
        self.latency = latency
    }
}

/// A document of the template with some of its values replaced. Refuses keys that the template does not have.
func filled(_ template: JSON, _ values: JSON) throws -> JSON {
    var made = template
    for (key, value) in values {
        guard made[key] != nil else { throw Failure("the template has no key \(key)") }
        made[key] = value
    }
    return made
}

struct Failure: Error, CustomStringConvertible {
    let description: String
    init(_ description: String) { self.description = description }
}
