#!/bin/sh
# Process 1 of the guest: mounts, modules, the network if there is one, a shell on the console, the agent.
/bin/busybox mkdir -p /proc /sys /dev /tmp /root /sbin /usr/bin /usr/sbin
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root

while read -r module; do
    insmod "/modules/$module" || echo "ivshmem-lab: module $module was not loaded"
done </modules/order

ip link set lo up
for word in $(cat /proc/cmdline); do
    case $word in
        ivshmem_lab.address=*) ip address add "${word#*=}" dev eth0 && ip link set eth0 up ;;
    esac
done

setsid sh -c 'while :; do sh </dev/ttyS0 >/dev/ttyS0 2>&1; sleep 1; done' &
for port in /sys/class/virtio-ports/*; do
    if [ "$(cat "$port/name" 2>/dev/null)" = org.ivshmem_lab.agent ]; then
        echo "ivshmem-lab: the agent starts after $(cut -d' ' -f1 /proc/uptime) s"
        exec ivshmem-tool agent "/dev/${port##*/}"
    fi
done
echo "ivshmem-lab: there is no port for the agent; the shell on the console is all there is"
while :; do wait; sleep 1000; done
