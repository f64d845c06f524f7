"""What a suite runs: `lora` and `qlora` (each with the main job), `prefix`, `gpu`."""
