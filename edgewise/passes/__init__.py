"""Graph passes: what is found in a captured program, compression that is inserted, and clean-up; `ExportedProgram` in and out."""
