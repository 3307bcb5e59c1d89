"""What ``ds_lvxattn.calibrate`` measures, a file each: machine, collectives, kernels, layers."""
