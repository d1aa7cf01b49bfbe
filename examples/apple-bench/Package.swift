// swift-tools-version: 6.0
import PackageDescription

let package = Package(
    name: "edgewise-bench",
    platforms: [.macOS(.v15), .iOS(.v18)],
    targets: [
        .executableTarget(name: "edgewise-bench", resources: [.copy("Resources/record.json")])
    ]
)
