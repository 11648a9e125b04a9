// The least that an arm controller needs: hears its orders, and says that it is there.
//
//   pick_subscriber ARM [COUNT]
//
// Prints one line for each order when the item comes to the arm, and ends after COUNT of them. Put
// your robot's motion in the place of the printf.
//
// A controller would use rclcpp. This uses the layer below rclcpp and rcl, with the same C++
// messages, so that it builds with the ROS wheels too: they have no rclcpp, and their rcl needs
// Python.

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <thread>

#include "rcutils/strdup.h"
#include "rmw/error_handling.h"
#include "rmw/rmw.h"
#include "rosidl_typesupport_cpp/message_type_support.hpp"
#include "waste_seg_ros/msg/arm_state.hpp"
#include "waste_seg_ros/msg/pick.hpp"

using builtin_interfaces::msg::Time;
using rosidl_typesupport_cpp::get_message_type_support_handle;
using std::chrono::milliseconds;
using waste_seg_ros::msg::ArmState;
using waste_seg_ros::msg::Pick;

static void check(bool good)
{
  if (!good) {
    std::fprintf(stderr, "%s\n", rmw_get_error_string().str);
    std::exit(1);
  }
}

static int64_t nanoseconds(const Time & time)
{
  return time.sec * INT64_C(1000000000) + time.nanosec;
}

static int64_t now()
{
  const auto since = std::chrono::system_clock::now().time_since_epoch();
  return std::chrono::duration_cast<std::chrono::nanoseconds>(since).count();
}

int main(int argc, char ** argv)
{
  const std::string arm = argc > 1 ? argv[1] : "arm_1";
  const unsigned long count = argc > 2 ? std::stoul(argv[2]) : 0;
  const char * domain = std::getenv("ROS_DOMAIN_ID");
  const rcutils_allocator_t allocator = rcutils_get_default_allocator();

  rmw_init_options_t options = rmw_get_zero_initialized_init_options();
  check(rmw_init_options_init(&options, allocator) == RMW_RET_OK);
  options.domain_id = domain ? std::stoul(domain) : 0;
  options.enclave = rcutils_strdup("/", allocator);
  options.discovery_options.automatic_discovery_range = RMW_AUTOMATIC_DISCOVERY_RANGE_LOCALHOST;
  rmw_context_t context = rmw_get_zero_initialized_context();
  check(rmw_init(&options, &context) == RMW_RET_OK);
  rmw_node_t * node = rmw_create_node(&context, "pick_subscriber", "/");
  check(node != nullptr);

  // Transient local: an arm that starts late, or again, hears the orders that still stand.
  rmw_qos_profile_t standing = rmw_qos_profile_default;
  standing.depth = 64;
  standing.durability = RMW_QOS_POLICY_DURABILITY_TRANSIENT_LOCAL;
  const rmw_subscription_options_t subscription_options = rmw_get_default_subscription_options();
  rmw_subscription_t * picks = rmw_create_subscription(
    node, get_message_type_support_handle<Pick>(), "/picks", &standing, &subscription_options);
  check(picks != nullptr);
  const rmw_publisher_options_t publisher_options = rmw_get_default_publisher_options();
  rmw_publisher_t * states = rmw_create_publisher(
    node, get_message_type_support_handle<ArmState>(), "/arms/state", &rmw_qos_profile_default,
    &publisher_options);
  check(states != nullptr);

  ArmState state;
  state.arm = arm;
  state.ready = true;
  std::multimap<int64_t, Pick> orders;
  for (int64_t said = 0; count == 0 || state.picked < count; ) {
    // An arm that is silent for a second counts as dead, and others get its items.
    if (now() - said > 250000000) {
      said = now();
      state.header.stamp.sec = static_cast<int32_t>(said / 1000000000);
      state.header.stamp.nanosec = static_cast<uint32_t>(said % 1000000000);
      check(rmw_publish(states, &state, nullptr) == RMW_RET_OK);
    }
    Pick pick;
    bool taken = false;
    check(rmw_take(picks, &pick, &taken, nullptr) == RMW_RET_OK);
    if (taken) {
      if (pick.arm == arm && nanoseconds(pick.expiry) > now()) {
        orders.emplace(nanoseconds(pick.pick_time), pick);
      }
      continue;
    }
    if (orders.empty() || orders.begin()->first > now()) {
      std::this_thread::sleep_for(milliseconds(2));
      continue;
    }
    const Pick order = orders.begin()->second;
    orders.erase(orders.begin());
    const auto & grasp = order.item.grasp.position;  // in the belt frame, as it is at pick_time
    std::printf(
      "%u %s at %.3f %.3f %.3f, opening %.3f\n", order.track_id, order.item.class_id.c_str(),
      grasp.x, grasp.y, grasp.z, order.item.grasp_width);
    std::fflush(stdout);
    ++state.picked;
    state.last_track_ids.push_back(order.track_id);
    if (state.last_track_ids.size() > 16) {
      state.last_track_ids.erase(state.last_track_ids.begin());
    }
  }
  check(rmw_publish(states, &state, nullptr) == RMW_RET_OK);
  std::this_thread::sleep_for(milliseconds(200));

  check(rmw_destroy_publisher(node, states) == RMW_RET_OK);
  check(rmw_destroy_subscription(node, picks) == RMW_RET_OK);
  check(rmw_destroy_node(node) == RMW_RET_OK);
  check(rmw_shutdown(&context) == RMW_RET_OK);
  check(rmw_context_fini(&context) == RMW_RET_OK);
  check(rmw_init_options_fini(&options) == RMW_RET_OK);
  return 0;
}
