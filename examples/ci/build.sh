#!/bin/sh
# Build the bundles of a recipe and hold them to its gates, on any CI system: `sh build.sh [RECIPE [DIR]]`.
#
# Exit code: 0 all is well; 1 a check or a gate failed; 2 bad input. In any case DIR has the bundles that were built, and the reports
# folder has record.json (figures, for a later build to be compared with) and gates.xml (JUnit).
#
# EDGEWISE_CACHE      keep this folder from one run to the next: what was built once is then copied
# EDGEWISE_REPORTS    where reports go; build/reports if it is not set
# EDGEWISE_BASELINE   the record.json of an earlier run, for the limits under `regressions` in the recipe
# EDGEWISE_JOBS       processes; one for each core if it is not set
set -eu

recipe=${1:-recipe.yaml}
out=${2:-build/bundles}
reports=${EDGEWISE_REPORTS:-build/reports}

mkdir -p "$reports"
set -- "$recipe" -o "$out" --record "$reports/record.json" --junit "$reports/gates.xml"
if [ -n "${EDGEWISE_BASELINE:-}" ]; then set -- "$@" --baseline "$EDGEWISE_BASELINE"; fi
if [ -n "${EDGEWISE_JOBS:-}" ]; then set -- "$@" --jobs "$EDGEWISE_JOBS"; fi
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then set -- "$@" --summary "$GITHUB_STEP_SUMMARY"; fi
exec edgewise build "$@"
