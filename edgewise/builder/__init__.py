"""Builds: a recipe becomes bundles, in parallel, each made once; gates on what came out; what two bundles differ in."""
