"""The PC around the device: buses, bridges, interrupt controller, serial port, boot. Pure: the CPU is an interface."""
