"""The loop: `trainer` is it on one screen, `state` what a run is made of, `updating` how samples move the weights;
`offline` is the loop on given answers. Beside them is what a step may ask for: where credit comes from (`assignment`,
`redistribution`), which samples it takes (`resampling`, `replay`, `examples`), how weights move (`balance`,
`trust_region`, `weights`), what is watched (`guards`)."""
